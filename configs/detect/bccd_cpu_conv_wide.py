# Blood cells as in bccd_cpu_conv.py, with a kernel that reaches from each of the 20 x 15 tokens to every other.
_base_ = "bccd_cpu_conv.py"
model = dict(attention=dict(kernel_size=39))
