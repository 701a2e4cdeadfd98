// The list of defects found by a launch. A report is one line: kind, address, site, other site and text, between tabs.
#include <cstdio>
#include <set>
#include <tuple>
#include <vector>

#include "runtime.h"

namespace simt {
namespace {

std::vector<std::string> reports;
std::set<std::tuple<std::string, std::string, std::string>> reported;  // kind and sites: one report for all threads

}  // namespace

std::string format(const char* pattern, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, pattern);
    std::vsnprintf(text, sizeof text, pattern, arguments);
    va_end(arguments);
    return text;
}

std::string place(Site site) { return format("%s:%d", site.file, site.line); }
std::string place(uint32_t pc) { return pc == 0 ? "" : format("@%x", pc); }

void report(const char* kind, const std::string& address, const std::string& site, const std::string& other_site,
            const std::string& text) {
    if (!reported.emplace(kind, site, other_site).second) return;
    const uint3 b = block.index;
    reports.push_back(std::string(kind) + '\t' + address + '\t' + site + '\t' + other_site + '\t' + text +
                      format(" (block %u,%u,%u)", b.x, b.y, b.z));
}

void forget_reports() {
    reports.clear();
    reported.clear();
}

}  // namespace simt

// Report number i, or null after the last.
extern "C" __attribute__((visibility("default"))) const char* simt_report(size_t i) {
    return i < simt::reports.size() ? simt::reports[i].c_str() : nullptr;
}
