# Blood cells as in bccd_cpu_padre.py, with a learned gain per channel on PADRe's output that begins at 0.02, so that at
# the start the encoder mixes next to nothing.
_base_ = "bccd_cpu_padre.py"
model = dict(attention=dict(gain=0.02))
