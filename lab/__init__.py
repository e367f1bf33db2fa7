"""Where the method is studied: each file is a program, python -m lab.x; the product does not need them."""
