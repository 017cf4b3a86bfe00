# Blood cells as in bccd_cpu_padre.py, with PADRe on tokens without their positions.
_base_ = "bccd_cpu_padre.py"
model = dict(attention=dict(positions=False))
