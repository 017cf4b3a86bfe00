# Blood cells as in bccd_cpu_softmax_long.py, with PADRe of degree 2 in the encoder.
_base_ = "bccd_cpu_softmax_long.py"
model = dict(attention=dict(name="padre", degree=2, where="encoder.*"))
