# Tree crowns in tiles of 224 pixels, with DAB-DETR's own attention
_base_ = "small_dab_detr.py"
asset = "neon_tree_crowns_coco"
data_root = "data/neon_tree_crowns_coco/"

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
