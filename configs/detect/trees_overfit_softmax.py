_base_ = "trees_softmax.py"
epochs = 400
train_dataloader = dict(dataset=dict(indices=20))
tested = dict(ann_file="annotations/instances_train.json", data_prefix=dict(img="train/"), indices=20)
val_dataloader = dict(dataset=tested)
test_dataloader = dict(dataset=tested)
train_cfg = dict(max_epochs=epochs, val_interval=25)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=epochs, end=epochs, convert_to_iter_based=True, eta_min_ratio=0.02),
]
default_hooks = dict(checkpoint=dict(interval=25), logger=dict(interval=5))
