# Blood cells as in bccd_cpu_softmax.py, with SimA in the encoder: attention without softmax, over all tokens.
_base_ = "bccd_cpu_softmax.py"
model = dict(attention=dict(name="sima", where="encoder.*"))
