"""A package, so that its tests share one endpoint that ends with them."""
