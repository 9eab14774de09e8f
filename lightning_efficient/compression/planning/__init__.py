"""Is compression worth it here, and how much of it: a measured link, a cost model of a step, and a recommendation.

``link_probe`` measures; ``cost_model`` holds the link, the device and the workload; ``cost_methods`` says what each
method puts on the link; ``timeline`` lays a step out; ``recommendation`` chooses.
"""
