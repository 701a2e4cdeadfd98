// Threads for the tasks of one call: those of the OpenMP runtime that torch has loaded, so that there is one set of
// them, with torch's number and the user's OMP_ settings; a pool of our own where there is no such runtime.
//
// A child that was forked has no threads, and libgomp would wait for them for ever: it has a pool of its own.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace fastattn {

using ThreadBody = void (*)(void*);

// Threads that sleep between calls. The caller works, too.
class ThreadPool {
  public:
    // Calls body(data) in `threads` threads at once, one call after the other.
    void run(ThreadBody body, void* data, int threads) {
        const std::lock_guard<std::mutex> one_at_a_time(call_);
        while (workers_ < threads - 1) start_worker();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            body_ = body, data_ = data, wanted_ = threads - 1, left_ = threads - 1, ++generation_;
        }
        wake_.notify_all();
        body(data);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return left_ == 0; });
    }

  private:
    void start_worker() {
        std::thread([this, id = workers_, seen = generation_] { work(id, seen); }).detach();
        ++workers_;
    }
    void work(int id, long seen) {
        while (true) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (id >= wanted_) continue;
            const ThreadBody body = body_;
            void* const data = data_;
            lock.unlock();
            body(data);
            lock.lock();
            if (--left_ == 0) done_.notify_one();
        }
    }

    std::mutex call_, mutex_;
    std::condition_variable wake_, done_;
    ThreadBody body_ = nullptr;
    void* data_ = nullptr;
    int workers_ = 0, wanted_ = 0, left_ = 0;
    long generation_ = 0;
};

// All of this process; a child gets new ones.
class Threads {
  public:
    // Never destroyed: at exit its threads may still be waiting.
    static Threads& get() {
        static Threads& threads = *new Threads;
        return threads;
    }

    // Calls body(data) in `threads` threads at once.
    void run(ThreadBody body, void* data, int threads) {
        if (threads <= 1) return body(data);
        if (gomp_parallel_ != nullptr && !uses_pool_) return gomp_parallel_(body, data, threads, 0);
        pool_->run(body, data, threads);
    }

    // A name of what runs: "OpenMP" or "pool".
    const char* name() const { return gomp_parallel_ != nullptr && !uses_pool_ ? "OpenMP" : "pool"; }
    void use_pool(bool uses_pool) { uses_pool_ = uses_pool; }

  private:
    using GompParallel = void (*)(ThreadBody, void*, unsigned, unsigned);

    Threads() : gomp_parallel_(reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
        pthread_atfork(nullptr, nullptr, [] {
            get().uses_pool_ = true;
            get().pool_ = new ThreadPool;  // the old one's locks may be held by threads that are no more
        });
    }

    const GompParallel gomp_parallel_;
    ThreadPool* pool_ = new ThreadPool;
    std::atomic<bool> uses_pool_{false};
};

// Calls f(task, scratch) for the tasks 0 ... tasks - 1, each in the next thread that is free: they differ in length.
template <class F>
void for_each_task(long tasks, long scratch_floats, int threads, F f) {
    struct Shared {
        std::atomic<long> next{0};
        long tasks, floats;
        F& f;
    } shared{{0}, tasks, scratch_floats, f};
    const auto body = [](void* data) {
        constexpr std::size_t kLine = 64;
        Shared& shared = *static_cast<Shared*>(data);
        thread_local std::vector<char> memory;
        const std::size_t bytes = shared.floats * sizeof(float) + kLine;
        if (memory.size() < bytes) memory.resize(bytes);
        const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
        auto* const scratch = reinterpret_cast<float*>((start + kLine - 1) / kLine * kLine);
        for (long task; (task = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.tasks;)
            shared.f(task, scratch);
    };
    Threads::get().run(body, &shared, static_cast<int>(tasks < threads ? tasks : threads));
}

}  // namespace fastattn
