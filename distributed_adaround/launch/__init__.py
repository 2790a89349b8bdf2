"""Files that start a job on a cluster: torchrun.sh for one machine, sbatch scripts for Slurm, manifests for Kubernetes.
What is rendered only says which machines, where they meet, and which job. No torch: files are made on a login node."""
