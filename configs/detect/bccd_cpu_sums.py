# Blood cells as in bccd_cpu_padre.py, with sums in the place of the products: the same maps and convolutions, linear.
_base_ = "bccd_cpu_padre.py"
model = dict(attention=dict(products=False))
