"""A package, so that its tests share one Ray head that ends with them."""
