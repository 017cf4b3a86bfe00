# Blood cells as in bccd_cpu_padre.py, with PADRe's output normalized, so that it cannot outgrow the residual stream.
_base_ = "bccd_cpu_padre.py"
model = dict(attention=dict(out_norm=True, gain=0.5))
