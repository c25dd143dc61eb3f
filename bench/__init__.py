if __name__ != "setriton.bench":
    raise ImportError("this folder is setriton.bench; import it by that name")
