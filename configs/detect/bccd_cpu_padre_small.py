# Blood cells as in bccd_cpu_padre.py, with kernels of 3 x 3.
_base_ = "bccd_cpu_padre.py"
model = dict(attention=dict(kernel_size=3))
