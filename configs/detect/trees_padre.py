# Tree crowns as in trees_softmax.py, with PADRe of degree 2 in the encoder.
_base_ = "trees_softmax.py"
model = dict(attention=dict(name="padre", degree=2, where="encoder.*"))
