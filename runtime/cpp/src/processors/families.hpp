// The families that this library runs; each is a file beside this one.
#pragma once

#include "processors/processor.hpp"

namespace vlmtrim {

std::unique_ptr<Processor> make_gemma3(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_idefics3(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_internvl(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_llava(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_llava_next(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_llava_onevision(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_mllama(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_qwen2_vl(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_qwen2_5_vl(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_qwen3_vl(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_smolvlm(const Folder& files, const Contract& contract);
std::unique_ptr<Processor> make_video_llava(const Folder& files, const Contract& contract);

}  // namespace vlmtrim
