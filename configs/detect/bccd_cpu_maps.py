# Blood cells as in bccd_cpu_padre1.py, without convolutions: a linear map of each token alone, the half of degree 1 that
# conv leaves out.
_base_ = "bccd_cpu_padre1.py"
model = dict(attention=dict(token_mixing="identity"))
