"""What is wrong with a configuration, or with what is done to a model of it."""


class ConfigurationError(ValueError):
    """A field has a value that is not allowed, or that the model's family cannot honour."""
