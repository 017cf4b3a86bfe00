# Can it learn? 20 tiles of tree crowns, trained on and tested on, with DAB-DETR's own attention. It says nothing
# about new images: the goal is an AP50 of at least 0.9 on those it has seen.
#
#   python train/detect.py configs/detect/trees_overfit_softmax.py
#   python train/detect.py configs/detect/trees_overfit_padre.py
#   python eval/detect.py configs/detect/trees_overfit_softmax.py configs/detect/trees_overfit_padre.py
_base_ = "trees_softmax.py"

epochs = 600
train_dataloader = dict(dataset=dict(indices=20, pipeline=_base_.val_dataloader.dataset.pipeline))  # without flips
tested = dict(
    ann_file="annotations/instances_train.json",
    data_prefix=dict(img="train/"),
    filter_cfg=dict(filter_empty_gt=True),
    test_mode=False,  # or mmdet would not filter, and take other tiles
    indices=20,
)
val_dataloader = dict(dataset=tested)
test_dataloader = dict(dataset=tested)
train_cfg = dict(max_epochs=epochs, val_interval=25)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=epochs, end=epochs, convert_to_iter_based=True, eta_min_ratio=0.02),
]
default_hooks = dict(checkpoint=dict(interval=25), logger=dict(interval=5))
