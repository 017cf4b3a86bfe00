# Blood cells as in bccd_cpu_softmax.py, without attention in the encoder: a window of one token less the token is zero.
_base_ = "bccd_cpu_softmax.py"
label = "no mixing"
model = dict(attention=dict(name="pooling", pool_size=1, where="encoder.*"))
