# Blood cells as in bccd_cpu_padre.py, with every factor but the first started near one, so that the layer starts near
# degree 1.
_base_ = "bccd_cpu_padre.py"
model = dict(attention=dict(start="identity"))
