# What PADRe saves in DETR R-50's encoder, from images of 320 to 1,333 pixels: the attention alone, the encoder, the
# whole detector, against unfused softmax as timm has it, PyTorch's SDPA, and mmdet's own (torch's, unfused,
# which also averages its weights over heads). Nothing is trained.
#
#   python eval/detect.py configs/detect/detr_r50_cost.py
_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["attnzoo.tasks.detect.model"])
model = dict(type="SwappedDETR")
data_root = None
cost = dict(
    sizes=[(320, 320), (480, 480), (640, 640), (800, 800), (800, 1333), (1066, 1066), (1333, 1333)],
    batch=1,
    repeats=10,
    attentions=[
        dict(name="softmax"),
        dict(name="sdpa"),
        dict(name="padre", degree=2, where="encoder.*"),
        dict(name="padre", degree=3, where="encoder.*"),
    ],
)
