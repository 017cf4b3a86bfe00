# Blood cells as in bccd_cpu_softmax.py for 150 epochs in place of 48. A training takes about 50 minutes of one core.
_base_ = "bccd_cpu_softmax.py"

epochs = 150
train_cfg = dict(max_epochs=epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", T_max=epochs, end=epochs, convert_to_iter_based=True, eta_min_ratio=0.02),
]
