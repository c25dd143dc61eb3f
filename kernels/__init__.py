if __name__ != "setriton.kernels":
    raise ImportError("this folder is setriton.kernels; import it by that name")
