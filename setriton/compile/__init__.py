"""SE blocks in compiled graphs: found, replaced by fused operations, reported.

`torch.compile(model, backend="setriton")` is `backend.setriton`, found by its entry point.
"""
