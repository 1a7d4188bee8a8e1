/* Sends frames, a line of hex digits each, by the network card eth0; run in a guest without python. */
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(void)
{
    char line[4096];
    unsigned char frame[2048];
    struct sockaddr_ll card = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex("eth0")};
    int raw = socket(AF_PACKET, SOCK_RAW, htons(3));
    if (raw < 0 || bind(raw, (struct sockaddr *)&card, sizeof card) < 0)
        return perror("eth0"), 1;
    while (fgets(line, sizeof line, stdin)) {
        size_t size = 0;
        for (char *digits = line; sscanf(digits, "%2hhx", &frame[size]) == 1; digits += 2)
            size++;
        if (size && send(raw, frame, size, 0) != (ssize_t)size)
            return perror("send"), 1;
    }
    return puts("sent") < 0;
}
