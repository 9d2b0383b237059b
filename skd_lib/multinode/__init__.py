"""A training step on several machines, by a `TrainJob` of Kubeflow Trainer v2.

`manifest` makes the job, `cluster` talks to Kubernetes, `exchange` carries inputs and results through object storage,
`logs` follows the first node, `node` and `launch` are the commands of each node, `coordinate` is the step that waits
for them, and `cleanup` deletes jobs that no step waits for any more.
"""
