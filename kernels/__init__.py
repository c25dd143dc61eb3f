"""Triton kernels and their launchers: tensors in, tensors out, no autograd. The package itself imports no Triton."""

if __name__ != "setriton.kernels":
    raise ImportError("this folder is setriton.kernels; import it by that name")
