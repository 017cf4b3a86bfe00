# The same 20 tiles as in trees_overfit_softmax.py, with PADRe of degree 2 in the encoder.
_base_ = "trees_overfit_softmax.py"
model = dict(attention=dict(name="padre", degree=2, where="encoder.*"))
