# Blood cells as in bccd_cpu_padre1.py, without its convolution: a linear map of each token alone.
_base_ = "bccd_cpu_padre1.py"
model = dict(attention=dict(token_mixing="identity"))
