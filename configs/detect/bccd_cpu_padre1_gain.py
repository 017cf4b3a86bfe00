# Blood cells as in bccd_cpu_padre1.py, with a learned gain per channel on the output that begins at 0.02.
_base_ = "bccd_cpu_padre1.py"
model = dict(attention=dict(gain=0.02))
