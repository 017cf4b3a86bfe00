# Blood cells (BCCD: 205 photos of 640 x 480 pixels to train with, 87 to validate; red cells, white cells, platelets)
# with DAB-DETR's own attention, for one GPU: ResNet-18 of its full width, 100 epochs from scratch. Not yet run.
#
#   python train/detect.py configs/detect/bccd_softmax.py asset_path=BCCD_Dataset
#   python train/detect.py configs/detect/bccd_softmax.py asset_path=BCCD_Dataset randomness.seed=1
#   python train/detect.py configs/detect/bccd_padre.py                           and with randomness.seed=1
#   python eval/detect.py configs/detect/bccd_softmax.py configs/detect/bccd_padre.py
#
# asset_path is a clone of https://github.com/Shenggan/BCCD_Dataset; it is needed once.
_base_ = "small_dab_detr.py"
asset = "bccd_coco"
data_root = "data/bccd_coco/"

epochs = 100
model = dict(
    num_queries=100,
    backbone=dict(base_channels=64),
    neck=dict(in_channels=[256]),
    bbox_head=dict(num_classes=3),
    test_cfg=dict(max_per_img=100),
)

image = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
resize = dict(type="Resize", scale=(640, 480), keep_ratio=True)
flip = dict(type="RandomFlip", prob=0.5, direction=["horizontal", "vertical"])
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances")
cells = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=("Platelets", "RBC", "WBC")))
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **cells,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        pipeline=[*image, resize, flip, dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **cells,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=[*image, resize, dict(type="PackDetInputs", meta_keys=keys)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=epochs, val_interval=4)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=epochs, end=epochs, convert_to_iter_based=True, eta_min_ratio=0.02),
]
cost = dict(sizes=[(480, 640)], batch=1, repeats=20)
