# Tree crowns from the air, in tiles of 224 pixels (110 to train with, 20 of another photo to test), with DAB-DETR's own
# attention: a first try, two minutes on two CPU cores. So few tiles and epochs do not make a detector; AP50 stays low.
#
#   python train/detect.py configs/detect/trees_softmax.py
#   python train/detect.py configs/detect/trees_padre.py
#   python eval/detect.py configs/detect/trees_softmax.py configs/detect/trees_padre.py
_base_ = "small_dab_detr.py"
asset = "neon_tree_crowns_coco"
data_root = "data/neon_tree_crowns_coco/"

epochs = 20
train_cfg = dict(max_epochs=epochs, val_interval=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=epochs, end=epochs, convert_to_iter_based=True, eta_min_ratio=0.02),
]
default_hooks = dict(checkpoint=dict(interval=2))
cost = dict(sizes=[(224, 224)], batch=1, repeats=20)

image = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
resize = dict(type="Resize", scale=(224, 224), keep_ratio=True)
flip = [dict(type="RandomFlip", prob=0.5, direction=["horizontal", "vertical"])]
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances")
crowns = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=("Tree",)))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **crowns,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[*image, resize, *flip, dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **crowns,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=[*image, resize, dict(type="PackDetInputs", meta_keys=keys)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator
