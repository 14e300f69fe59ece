"""Checks Kubernetes manifests as far as that is possible without a cluster. Imports neither torch nor ray.

`check` renders a folder's kustomizations, or reads files, and gives every set of manifests to the rules: schemas (CRDs
and built-in kinds), KubeRay's own (operator, operator_jobs, operator_service), and what no schema sees (references,
resources, exposure, production, project, serving). A rule is a generator function, and its name is the function's.
"""
