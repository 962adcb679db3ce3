// Runs the threads of a block one at a time on the CPU. Each thread has a stack of its own, a fiber, and runs until it
// has to wait for other threads or ends; then a random other thread continues. Blocks run one after another.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

inline uint3 threadIdx, blockIdx;  // of the running thread

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10, kMostShared = 48 << 10, kLargestValue = 16, kSharedAlignment = 16;

struct Thread {
  unsigned number = 0;  // in the block
  uint3 index{};
  bool ended = false;
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

// A line of the kernel, and the threads that wait for each other there: the lanes of a warp in `mask`, or the block.
struct Place {
  std::string file;
  unsigned line, column;
  int warp = -1;  // -1: the whole block
  unsigned mask = 0;

  explicit Place(const std::source_location& at) : file(at.file_name()), line(at.line()), column(at.column()) {}
  auto operator<=>(const Place&) const = default;
  std::string text() const { return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(line); }
};

// Threads that have arrived at a place, and the value that each lane brought.
struct Meeting {
  std::vector<Thread*> present;
  unsigned lanes = 0;
  size_t bytes = 0;
  std::byte values[kWarp][kLargestValue];
};

struct FreeShared {
  void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t(kSharedAlignment)); }
};

class Block {
 public:
  // `threads` are reused from block to block; the kernel is called once in each.
  Block(std::vector<Thread>& threads, std::mt19937& random, const std::function<void()>& kernel)
      : threads_(threads), random_(random), kernel_(kernel) {}

  void run();
  std::shared_ptr<const Meeting> meet(Place place, const void* value = nullptr, size_t bytes = 0);
  std::byte* shared(const Place& declared, size_t bytes);
  [[noreturn]] void fail(const std::string& reason);
  unsigned lane() const { return current_->number % kWarp; }
  unsigned warp() const { return current_->number / kWarp; }

 private:
  static void enter();
  void prepare(Thread& thread);
  void resume(Thread& thread);
  void pause();
  bool complete(const Place& place, const Meeting& meeting) const;
  void close_meetings();
  std::string waiting() const;

  std::vector<Thread>& threads_;
  std::mt19937& random_;
  const std::function<void()>& kernel_;
  std::vector<Thread*> ready_;
  Thread* current_ = nullptr;
  std::map<Place, std::shared_ptr<Meeting>> meetings_;
  std::map<Place, std::unique_ptr<std::byte, FreeShared>> shared_;
  size_t shared_bytes_ = 0;
  std::string fault_;
  ucontext_t host_{};
  const void* host_stack_ = nullptr;
  size_t host_stack_bytes_ = 0;
};

inline Block* running = nullptr;

// Either a random thread is next, so that threads advance alike, or the one that became ready last, so that one warp
// runs as far ahead of the others as barriers allow.
inline void Block::run() {
  running = this;
  for (Thread& thread : threads_) {
    prepare(thread);
    ready_.push_back(&thread);
  }
  std::shuffle(ready_.begin(), ready_.end(), random_);
  const bool runs_ahead = random_() % 2;
  while (!ready_.empty() && fault_.empty()) {
    if (!runs_ahead) std::swap(ready_[random_() % ready_.size()], ready_.back());
    Thread* next = ready_.back();
    ready_.pop_back();
    resume(*next);
  }
  if (fault_.empty() && !meetings_.empty()) fault_ = "threads wait for others that do not come: " + waiting();
  running = nullptr;
  if (!fault_.empty()) throw std::runtime_error("CUDA emulation: " + fault_);
}

inline void Block::prepare(Thread& thread) {
  thread.ended = false;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, &Block::enter, 0);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(thread.stack.get(), kStackBytes);  // the last thread on this stack never returned
#endif
}

inline void Block::enter() {
  Block& block = *running;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.host_stack_, &block.host_stack_bytes_);
#endif
  block.kernel_();
  block.current_->ended = true;
  block.close_meetings();  // of the threads that waited for this one only
  block.pause();
}

inline void Block::resume(Thread& thread) {
  current_ = &thread;
  threadIdx = thread.index;
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, thread.stack.get(), kStackBytes);
#endif
  swapcontext(&host_, &thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

inline void Block::pause() {
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(current_->ended ? nullptr : &frames, host_stack_, host_stack_bytes_);
#endif
  swapcontext(&current_->context, &host_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

// Stops the block from inside of a thread; `run` then throws.
inline void Block::fail(const std::string& reason) {
  fault_ = reason + ", block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current_->number);
  while (true) pause();
}

// Waits until all threads that the place is for are there or have ended.
inline std::shared_ptr<const Meeting> Block::meet(Place place, const void* value, size_t bytes) {
  if (place.warp >= 0 && !(place.mask >> lane() & 1)) fail(place.text() + ": the mask lacks the lane itself");
  auto& open = meetings_[place];
  if (!open) open = std::make_shared<Meeting>();
  const auto meeting = open;
  meeting->present.push_back(current_);
  meeting->lanes |= 1u << lane();
  if (bytes > 0) std::memcpy(meeting->values[lane()], value, bytes);
  close_meetings();
  pause();
  return meeting;
}

inline bool Block::complete(const Place& place, const Meeting& meeting) const {
  const auto expected = [&](const Thread& thread) {
    const bool meant = place.warp < 0 || (thread.number / kWarp == static_cast<unsigned>(place.warp) &&
                                          (place.mask >> thread.number % kWarp & 1));
    return meant && !thread.ended;
  };
  const size_t first = place.warp < 0 ? 0 : place.warp * kWarp;
  const size_t last = place.warp < 0 ? threads_.size() : std::min(threads_.size(), first + kWarp);
  return std::count_if(threads_.begin() + first, threads_.begin() + last, expected) ==
         static_cast<std::ptrdiff_t>(meeting.present.size());
}

inline void Block::close_meetings() {
  std::erase_if(meetings_, [&](const auto& entry) {
    const auto& [place, meeting] = entry;
    const bool over = complete(place, *meeting);
    if (over) ready_.insert(ready_.end(), meeting->present.begin(), meeting->present.end());
    return over;
  });
}

inline std::string Block::waiting() const {
  std::string found;
  for (const auto& [place, meeting] : meetings_) {
    found += (found.empty() ? "" : ", ") + std::to_string(meeting->present.size()) + " at " + place.text();
  }
  return found;
}

// Shared memory is filled with ones: a NaN of each floating type, and -1. Each array lies on the heap alone, so that
// the address sanitizer finds accesses behind it.
inline std::byte* Block::shared(const Place& declared, size_t bytes) {
  auto& memory = shared_[declared];
  if (!memory) {
    shared_bytes_ += bytes;
    if (shared_bytes_ > kMostShared) {
      fail(std::to_string(shared_bytes_) + " bytes of shared memory, expected at most " + std::to_string(kMostShared));
    }
    memory.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kSharedAlignment))));
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

}  // namespace cuda_emulation
