# Blood cells as in bccd_cpu_softmax.py, with PADRe of degree 1, a linear map, in the encoder.
_base_ = "bccd_cpu_softmax.py"
model = dict(attention=dict(name="padre", degree=1, where="encoder.*"))
