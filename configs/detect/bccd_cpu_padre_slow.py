# Blood cells as in bccd_cpu_padre.py, with a tenth of the learning rate for PADRe.
_base_ = "bccd_cpu_padre.py"
label = "padre degree=2, a tenth of the rate"
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"attn.mixer": dict(lr_mult=0.1)}))
