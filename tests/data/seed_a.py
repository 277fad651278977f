import torch
from discrete_key_value_bottleneck import DiscreteKeyValueBottleneck, DiscreteKeyValueBottleneckConfig

# Define the configuration
config = DiscreteKeyValueBottleneckConfig(
    dim=128,
    num_memories=256,
    num_memory_codebooks=4,
    average_pool_memories=True
)

# Instantiate the bottleneck model
bottleneck = DiscreteKeyValueBottleneck(config)

# Create an example input tensor
input_tensor = torch.randn(2, 64, 128)

# Forward pass through the bottleneck
output = bottleneck(input_tensor)

print(output.shape)

