# Blood cells as in bccd_cpu_softmax.py, without attention in the encoder: a window of one token less the token is zero.
# Its cost is not measured, since an output that is zero everywhere passes no gate.
_base_ = "bccd_cpu_softmax.py"
label = "no mixing"
cost = None
model = dict(attention=dict(name="pooling", pool_size=1, where="encoder.*"))
