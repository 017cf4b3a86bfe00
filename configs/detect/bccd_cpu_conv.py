# Blood cells as in bccd_cpu_softmax.py, with one depthwise convolution in the place of the encoder's attention.
_base_ = "bccd_cpu_softmax.py"
model = dict(attention=dict(name="conv", where="encoder.*"))
