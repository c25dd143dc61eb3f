"""Instruments that need no GPU: what interpreted kernels do to memory, in one order of their programs or in any."""
