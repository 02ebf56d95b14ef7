"""What every other room stands on: errors and exit codes, durable files, processes. It knows no study."""
