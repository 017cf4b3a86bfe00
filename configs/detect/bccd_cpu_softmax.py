# Blood cells as in bccd_softmax.py at half the resolution, 320 x 240 pixels, with ResNet-18 of half its width and fewer
# epochs, for two CPU cores. A training takes about 17 minutes of one core (AMD EPYC).
_base_ = "bccd_softmax.py"

epochs = 48
small = dict(type="Resize", scale=(320, 240), keep_ratio=True)
model = dict(backbone=dict(base_channels=32), neck=dict(in_channels=[128]))
keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances")
tested = dict(dataset=dict(pipeline=[*_base_.image, small, dict(type="PackDetInputs", meta_keys=keys)]))
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=[*_base_.image, small, _base_.flip, dict(type="PackDetInputs")]),
)
val_dataloader = tested
test_dataloader = tested
train_cfg = dict(max_epochs=epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=epochs, end=epochs, convert_to_iter_based=True, eta_min_ratio=0.02),
]
default_hooks = dict(checkpoint=dict(interval=2))
cost = dict(sizes=[(240, 320)], batch=1, repeats=20)
