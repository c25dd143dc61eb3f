if __name__ != "setriton.models":
    raise ImportError("this folder is setriton.models; import it by that name")
