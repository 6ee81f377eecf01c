"""Bodies of requests and responses; the published OpenAPI schema is made from them."""
