"""Files of the outside world, to our pytrees."""
