"""Several processes: how a weight is spread over them (`layout`), and a file for each way to spread one."""
