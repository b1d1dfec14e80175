// Runs the launches of a program for tensors of given shapes. Allocates nothing and waits for nothing, so a run can be
// captured in a CUDA graph.
#pragma once

#include "modules.h"

namespace mla2dsa {

struct Memory {
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    void* stream;
};

// inputs, outputs: one description per tensor of the program. memory: nullptr to go through every launch and check it
// without any. Throws Refused; what was launched by then stays launched.
void run(Definition const& definition, Loaded const& loaded, nvinfer1::PluginTensorDesc const* inputs,
    nvinfer1::PluginTensorDesc const* outputs, Memory const* memory);

// The most bytes of workspace that any form may need for shapes up to these. Throws Refused.
int64_t reservedBytes(Program const& program, nvinfer1::DynamicPluginTensorDesc const* inputs,
    nvinfer1::DynamicPluginTensorDesc const* outputs);

}  // namespace mla2dsa
