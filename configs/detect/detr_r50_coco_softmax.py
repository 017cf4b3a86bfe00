# DETR R-50 on COCO by mmdet's recipe of 150 epochs, with its own attention: the dense baseline of
# detr_r50_coco_padre2.py and detr_r50_coco_padre3.py. 8 GPUs; not run here.
#
#   torchrun --nproc_per_node 8 train/detect.py configs/detect/detr_r50_coco_softmax.py --launcher pytorch
#
# COCO is expected in data/coco, in its usual layout.
_base_ = "mmdet::detr/detr_r50_8xb2-150e_coco.py"
custom_imports = dict(imports=["attnzoo.tasks.detect.model"])
data_root = "data/coco/"
model = dict(type="SwappedDETR")
custom_hooks = [dict(type="SeedEachEpoch")]
randomness = dict(seed=0)
cost = dict(sizes=[(800, 1333)], batch=1, repeats=20)
