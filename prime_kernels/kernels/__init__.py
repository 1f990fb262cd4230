"""Triton kernels. Each file: the pipeline in words, the kernels, their launchers.

Under TRITON_INTERPRET=1 the same kernels run on a CPU, which is how the ordinary tests run them.
"""
