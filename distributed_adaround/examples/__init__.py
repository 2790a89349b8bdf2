"""Complete jobs that come with the package: model, weights, data and job file."""
