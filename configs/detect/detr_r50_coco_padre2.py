# DETR R-50 on COCO with PADRe of degree 2 instead of the encoder's self-attention. DETR is among the
# models of PADRe's paper, whose recipe is not known; this is that of detr_r50_coco_softmax.py. Not run here.
_base_ = "detr_r50_coco_softmax.py"
model = dict(attention=dict(name="padre", degree=2, where="encoder.*"))
